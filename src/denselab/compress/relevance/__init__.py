"""How much every site of a captured graph matters for what the model says.

Methods of one type (`scores.Relevance`): gradient times activation and Fisher information (`scores`), the change of
the output when a site is quantized (`sensitivity`), and relevance propagation (`lrp`), which is patented for some uses
and which nothing else imports. `hessian` says it element by element, `start` what of an output is asked about.
"""
