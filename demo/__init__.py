"""`make demo`: a pilot runs payloads of several users through a throw-away installation; every result is judged from outside."""
