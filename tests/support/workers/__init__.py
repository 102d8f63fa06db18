"""Programs that tests start under the real launcher."""
