"""A package, so that `tests.site` cannot be mistaken for the standard library's `site` or for another distribution's `tests`."""
