"""Between parts and disk: task files, plain checkpoints, merging."""
