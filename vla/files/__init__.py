"""Files that hold tensors: reading, writing, checking."""
