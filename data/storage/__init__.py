"""Where shards live: folders, and stores at https://, s3://, gs:// and hf://."""
