"""`nodewrap doctor`: what this node can do, tried for real, per launcher, mode and profile.

``probe`` tries kernel features in forked children; ``node`` is what the node's own files say; ``checks`` is the table of everything looked at;
``matrix`` makes yes, degraded and no of it; ``report`` prints.
"""
