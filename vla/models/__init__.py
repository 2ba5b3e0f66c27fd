"""The policy: networks, prompt, action tokens, and the folders that hold them."""
