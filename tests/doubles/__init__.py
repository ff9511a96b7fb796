"""What stands in for the world in tests: servers, engines, tiny models, files of every kind."""
