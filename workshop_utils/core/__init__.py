"""What every room stands on; it imports nothing else of this package."""
