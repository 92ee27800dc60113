"""The far side: stand-ins for the services and programs that the product talks to."""
