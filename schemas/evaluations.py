"""What evaluate.py writes and reads again: evaluation.json, episodes.jsonl, results.json."""
