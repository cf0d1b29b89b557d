"""Several replicas of the service behind Ray Serve's router (extra `ray`)."""
