"""``make bench``: what a start costs beside its peers, what an end costs, and what a running payload holds (docs/benchmarks.md)."""
