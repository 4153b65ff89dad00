"""Domains: what one task adds to a frozen detector that several tasks share."""
