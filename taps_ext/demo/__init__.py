"""The demo: one small network, six tasks of real images, three methods, and files that another process proves."""
