"""The policy: networks, prompt, action tokens, and the folders that they are read from and written to."""
