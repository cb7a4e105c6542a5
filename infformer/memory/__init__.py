"""What a layer remembers. State in, state out: nothing that outlives a call is kept on a module."""
