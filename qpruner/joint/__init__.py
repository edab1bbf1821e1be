"""Structure and precision decided together, by gates that are learned with gradients under one budget of bytes.

After "Joint Structural Pruning and Mixed-Precision Quantization for LLM Compression" (TOGA, arXiv 2606.07819), of which
only the abstract and summaries by others could be read. Taken from these are: a frozen language model with binary masks
over its units and over the input channels of its linears (high or low precision), emitted by a small network that is
trained with the cross entropy at the output of the compressed model; pruning before quantization; grouping the
channels of high precision; GPTQ on the result. The network, its constants and the penalty are DISP-LLM's (arXiv
2410.11988), the projection is GRASPrune's (arXiv 2604.19398), the estimator ReinMax's (arXiv 2304.08612). Our additions
are: one of several widths for each unit, stored bytes in place of counted bits, weights of all widths from a bank, and
a start from Fisher information instead of all gates open.
"""
