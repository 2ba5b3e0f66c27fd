"""Everything that an update needs: rollout buffer, further losses, engine, checkpoints."""
