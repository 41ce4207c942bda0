"""Floor 3: the cloud service. Never imports isthmus.edge."""
