"""Engines that run without our plugin: their events, their answers over HTTP, their place in the fleet."""
