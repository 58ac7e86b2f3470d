"""What a frozen model is: its layers, its head, its flags, and who adapts it."""
