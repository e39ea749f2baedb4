"""The archive: what describes the package, binds its outputs, states what is signed, packs it and checks a pack."""
