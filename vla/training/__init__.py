"""What an update needs: the rollout's buffer, losses beside the algorithm's own, the engine, checkpoints."""
