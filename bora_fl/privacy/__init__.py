"""Mechanisms, accounting, the site's ledger, masks of secure aggregation, and the audit."""
