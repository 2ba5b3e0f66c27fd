"""One batched simulation on the GPU for all envs of a rank."""
