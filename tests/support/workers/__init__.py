"""Programs that tests start as processes, most of them with the real launcher."""
