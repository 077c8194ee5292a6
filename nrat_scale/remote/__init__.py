"""Remote files: addresses, stores, transfers that resume, a verified cache, the Hub."""
