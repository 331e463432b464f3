"""Site policy: TOML for people (`source`, `schema`, `compile`, `lint`), one marshalled dict for the hot path (`store`, `evaluate`, `names`)."""
