"""NBD client: a sans-I/O protocol core and an asyncio connection."""
