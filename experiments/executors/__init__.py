"""Engines that runs execute on."""
