"""Moving pages between instances: verbs, same host, TCP; one interface."""
