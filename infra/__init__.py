"""The ground: settings, object storage, schema, tables, ledger, cluster, models."""
