"""What is recognised in a graph: linears, attention, the residual stream, blocks, towers."""
