//! Which models have their text encoders on the device all the time, when nobody has said it.
//!
//! Owns: the choice. Does not know: how encoders come and go. It depends on the models and the device's capacity alone.

use tale_models::device::Placement;
use tale_models::family::{LoadOptions, TextEncoders};
use tale_models::loading;
use tale_models::memory::MemoryPlan;
use tale_models::request::Phase;
use tale_models::{Error, LoadedModel, ModelCard, ModelSource, Request};

use super::assignment::Sizes;

/// What one model takes with its text encoders on the device, and with them away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Choice {
    resident: Sizes,
    /// None where that is no choice.
    on_demand: Option<Sizes>,
}

impl Choice {
    /// As the checkpoint's headers say. A model that cannot be loaded counts nothing: its loading will say why.
    pub(super) fn of(source: &ModelSource, placement: &Placement, options: &LoadOptions) -> Result<Self, Error> {
        let options = LoadOptions { text_encoders: TextEncoders::OnDemand, ..options.clone() };
        let (inspection, model) = loading::plan_quietly(source, placement, &options)?;
        let encoder_bytes = inspection.on_demand_bytes;
        let plan = model.as_ref().map_or_else(MemoryPlan::default, default_request);
        let on_demand = Sizes { resident_bytes: inspection.resident_bytes(), request_bytes: plan.peak_bytes() };
        // The encoders' bytes belong to the model then, and not to the phase in which they work.
        let without_encoders = plan.phases().iter().map(|of| match of.phase {
            Phase::Load | Phase::Encode => of.bytes - encoder_bytes,
            _ => of.bytes,
        });
        let resident = Sizes {
            resident_bytes: on_demand.resident_bytes + encoder_bytes,
            request_bytes: without_encoders.max().unwrap_or(0),
        };
        Ok(Self { resident, on_demand: (encoder_bytes > 0).then_some(on_demand) })
    }

    pub(super) fn sizes(&self, text_encoders: TextEncoders) -> Sizes {
        match text_encoders {
            TextEncoders::Resident => self.resident,
            TextEncoders::OnDemand => self.on_demand.unwrap_or(self.resident),
        }
    }

    fn saved_bytes(&self) -> usize {
        self.resident.resident_bytes - self.sizes(TextEncoders::OnDemand).resident_bytes
    }
}

/// What the model's default request needs; nothing of a model that asks for more than a prompt.
fn default_request(model: &LoadedModel) -> MemoryPlan {
    let ModelCard::Diffusion(card) = &model.card else { return MemoryPlan::default() };
    let request = card.resolve(&card.plainest(), 0);
    request.map_or_else(|_| MemoryPlan::default(), |request| model.runner.plan(&Request::Diffusion(request)))
}

/// Encoders stay where all models and a request of any one of them fit. Otherwise the largest ones go first, until they do
/// fit, or until there are no more.
pub(super) fn choose(models: &[Choice], capacity_bytes: usize) -> Vec<TextEncoders> {
    let mut chosen = vec![TextEncoders::Resident; models.len()];
    loop {
        let sizes = models.iter().zip(&chosen).map(|(model, chosen)| model.sizes(*chosen));
        let (resident_bytes, request_bytes) = sizes.fold((0, 0), |(resident, request): (usize, usize), sizes| {
            (resident.saturating_add(sizes.resident_bytes), request.max(sizes.request_bytes))
        });
        if resident_bytes.saturating_add(request_bytes) <= capacity_bytes {
            return chosen;
        }
        let resident = (0..models.len()).filter(|model| chosen[*model] == TextEncoders::Resident);
        let Some(next) =
            resident.filter(|model| models[*model].saved_bytes() > 0).max_by_key(|model| models[*model].saved_bytes())
        else {
            return chosen;
        };
        chosen[next] = TextEncoders::OnDemand;
    }
}

#[cfg(test)]
mod tests {
    use super::TextEncoders::{OnDemand, Resident};
    use super::*;

    fn with_encoders(rest: usize, encoders: usize, request_bytes: usize) -> Choice {
        Choice {
            resident: Sizes { resident_bytes: rest + encoders, request_bytes },
            on_demand: Some(Sizes { resident_bytes: rest, request_bytes: request_bytes.max(encoders) }),
        }
    }

    #[test]
    fn encoders_stay_where_all_fits() {
        let models = [with_encoders(60, 30, 10), with_encoders(20, 5, 8)];
        assert_eq!(choose(&models, 125), [Resident, Resident]);
    }

    #[test]
    fn the_largest_go_first_and_no_more_than_needed() {
        let models = [with_encoders(60, 30, 10), with_encoders(20, 5, 8)];
        // 60 + 25 for good, and 30 while the first one encodes.
        assert_eq!(choose(&models, 124), [OnDemand, Resident]);
        assert_eq!(choose(&models, 115), [OnDemand, Resident]);
        assert_eq!(choose(&models, 114), [OnDemand, OnDemand]);
    }

    #[test]
    fn what_never_fits_and_what_has_no_encoders_end_the_search() {
        assert_eq!(choose(&[with_encoders(60, 30, 10)], 1), [OnDemand]);
        let language = Choice { resident: Sizes { resident_bytes: 90, request_bytes: 0 }, on_demand: None };
        assert_eq!(choose(&[language, with_encoders(9, 3, 1)], 50), [Resident, OnDemand]);
        assert_eq!(choose(&[], 0), []);
    }
}
