"""Run folders and checkpoints: args.json, run_from_iteration_*.json, state.json, metrics.jsonl, evaluations.jsonl."""
