"""Where a store's bytes lie: a local file system or an object store, behind one protocol."""
