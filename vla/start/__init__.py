"""What happens before a model is loaded: flags and their files, the launcher's environment, checks."""
