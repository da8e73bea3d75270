"""The client: local training, private or not, and what a site keeps.

The ClientApp imports nothing large: where a site worker trains, the process that Flower starts for each message only
passes it on.
"""
