"""The stages a recipe can use: one file a stage, one line a stage in `registry.STAGES`."""
