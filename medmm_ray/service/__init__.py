"""The scorer as a service: the Ray Serve application, its requests and answers, and a client."""
