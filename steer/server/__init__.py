"""Processes around the engine: the HTTP application and the jobs."""
