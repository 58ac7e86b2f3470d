"""How a base module finds what the running task has for it."""
