"""Reference models: one file each, with `build()`, `samples()` and `metric()`."""
