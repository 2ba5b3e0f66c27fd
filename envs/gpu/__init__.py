"""All envs of a rank in one batch on the GPU."""
