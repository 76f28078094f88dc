"""The VMs of this host, whoever runs them: found by their processes, asked by their monitors."""
