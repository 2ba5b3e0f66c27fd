"""Model and adapter folders: config.json, adapter_config.json, dataset_statistics.json, preprocessor_config.json."""
