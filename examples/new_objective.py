"""The capacity of Burgess et al. (2018): pyro-vae train --objective new_objective.Capacity."""

from pyro_vae.objectives import Direct


class Capacity(Direct):
    def __init__(self, nats=10.0, weight=10.0):
        super().__init__(max_plate_nesting=1)
        self.nats, self.weight = nats, weight

    def differentiable_loss(self, model, guide, *batch):
        modelled, guided = self._get_trace(model, guide, batch, {})
        score = modelled.log_prob_sum(lambda name, site: site["is_observed"])
        kl = guided.log_prob_sum() - (modelled.log_prob_sum() - score)
        return self.weight * (kl - self.nats * len(batch[0])).abs() - score
