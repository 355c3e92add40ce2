//! Which models lie on which devices. Pure: sizes and capacities come in.
//!
//! A model lies where it was told to, otherwise on the device that has most room; the largest one chooses first. Then, where nobody
//! said how many replicas there are, models come a second time where there is room, those with the fewest first. On every device
//! there is room for one request of any of its models beside them all.

/// What one model takes.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// For good, and for one request with the model's own defaults, on each device.
    pub sizes: Vec<Sizes>,
    /// Where it may lie; empty where everywhere.
    pub devices: Vec<usize>,
    /// How many times; `None` where that was not said.
    pub replicas: Option<usize>,
    /// Whether it shares its devices with no other model: each has a part of it, of these sizes. All of them are said.
    pub is_alone: bool,
}

/// Bytes of a model on one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sizes {
    /// All the time.
    pub resident_bytes: usize,
    /// Of one request.
    pub request_bytes: usize,
}

/// A model for which there is no room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misfit {
    /// Its position.
    pub model: usize,
    /// What it takes where most is free for it: the device, the bytes, and those that are free there.
    pub device: usize,
    /// See there.
    pub needed_bytes: usize,
    /// See there.
    pub free_bytes: usize,
}

#[derive(Debug, Clone, Copy)]
struct Room {
    free_bytes: usize,
    /// The greediest request of its models.
    request_bytes: usize,
    /// Whether others may come.
    is_open: bool,
}

impl Room {
    fn needed_bytes(self, sizes: Sizes) -> usize {
        sizes.resident_bytes.saturating_add(sizes.request_bytes.max(self.request_bytes))
    }

    /// What would be left.
    fn left_bytes(self, sizes: Sizes) -> Option<usize> {
        self.free_bytes.checked_sub(self.needed_bytes(sizes))
    }

    fn take(&mut self, sizes: Sizes) {
        self.free_bytes = self.free_bytes.saturating_sub(sizes.resident_bytes);
        self.request_bytes = self.request_bytes.max(sizes.request_bytes);
    }
}

/// The devices of each model, in order.
pub fn assign(models: &[Wanted], capacity_bytes: &[usize]) -> Result<Vec<Vec<usize>>, Misfit> {
    let mut rooms: Vec<Room> =
        capacity_bytes.iter().map(|&free_bytes| Room { free_bytes, request_bytes: 0, is_open: true }).collect();
    let mut assigned = vec![Vec::new(); models.len()];
    // What was said first: it leaves no choice.
    let (told, free): (Vec<usize>, Vec<usize>) = (0..models.len()).partition(|model| models[*model].is_told());
    for model in told {
        for &device in &models[model].devices {
            rooms[device].take(models[model].sizes[device]);
            rooms[device].is_open &= !models[model].is_alone;
            assigned[model].push(device);
        }
    }
    let mut free: Vec<usize> = free;
    free.sort_by_key(|model| std::cmp::Reverse(models[*model].largest_bytes()));
    for &model in &free {
        for _ in 0..models[model].replicas.unwrap_or(1) {
            let device = models[model].roomiest(&rooms, &assigned[model]);
            let device = device.ok_or_else(|| models[model].misfit(model, &rooms, &assigned[model]))?;
            rooms[device].take(models[model].sizes[device]);
            assigned[model].push(device);
        }
    }
    let mut open: Vec<usize> = free.into_iter().filter(|model| models[*model].replicas.is_none()).collect();
    while !open.is_empty() {
        // The sort is stable: among equals the largest is first, as above.
        open.sort_by_key(|model| assigned[*model].len());
        let model = open[0];
        match models[model].roomiest(&rooms, &assigned[model]) {
            Some(device) => {
                rooms[device].take(models[model].sizes[device]);
                assigned[model].push(device);
            }
            None => drop(open.remove(0)),
        }
    }
    assigned.iter_mut().for_each(|devices| devices.sort_unstable());
    Ok(assigned)
}

impl Wanted {
    /// Whether every device of it was said.
    fn is_told(&self) -> bool {
        !self.devices.is_empty() && self.replicas.is_none_or(|replicas| replicas >= self.devices.len())
    }

    fn largest_bytes(&self) -> usize {
        self.sizes.iter().map(|sizes| sizes.resident_bytes).max().unwrap_or(0)
    }

    fn may_lie_on(&self, device: usize) -> bool {
        self.devices.is_empty() || self.devices.contains(&device)
    }

    fn candidates<'a>(&'a self, rooms: &'a [Room], taken: &'a [usize]) -> impl Iterator<Item = usize> + 'a {
        let is_open = |device: &usize| rooms[*device].is_open && !taken.contains(device);
        (0..rooms.len()).filter(move |device| self.may_lie_on(*device) && is_open(device))
    }

    /// The device on which most would be left, the first of several.
    fn roomiest(&self, rooms: &[Room], taken: &[usize]) -> Option<usize> {
        let left = self.candidates(rooms, taken).filter_map(|device| {
            let left = rooms[device].left_bytes(self.sizes[device])?;
            Some((left, std::cmp::Reverse(device)))
        });
        left.max().map(|(_, std::cmp::Reverse(device))| device)
    }

    fn misfit(&self, model: usize, rooms: &[Room], taken: &[usize]) -> Misfit {
        let nearest = self.candidates(rooms, taken).min_by_key(|device| {
            rooms[*device].needed_bytes(self.sizes[*device]).saturating_sub(rooms[*device].free_bytes)
        });
        // More replicas than devices: the ones that it has are full of it.
        let device = nearest.or_else(|| taken.first().copied()).unwrap_or(0);
        let needed_bytes = rooms[device].needed_bytes(self.sizes[device]);
        Misfit { model, device, needed_bytes, free_bytes: rooms[device].free_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(resident_bytes: usize, request_bytes: usize, num_devices: usize) -> Wanted {
        let sizes = vec![Sizes { resident_bytes, request_bytes }; num_devices];
        Wanted { sizes, devices: Vec::new(), replicas: None, is_alone: false }
    }

    fn once(wanted: Wanted) -> Wanted {
        Wanted { replicas: Some(1), ..wanted }
    }

    #[test]
    fn the_largest_chooses_first_and_the_rest_goes_where_room_is() {
        let models = [once(model(10, 0, 2)), once(model(60, 0, 2)), once(model(30, 0, 2))];
        assert_eq!(assign(&models, &[80, 64]).unwrap(), [vec![1], vec![0], vec![1]]);
    }

    #[test]
    fn replicas_come_where_there_is_room_those_with_the_fewest_first() {
        assert_eq!(assign(&[model(40, 10, 3)], &[80, 80, 49]).unwrap(), [vec![0, 1]]);
        let models = [model(40, 10, 2), model(30, 10, 2)];
        assert_eq!(assign(&models, &[80, 80]).unwrap(), [vec![0, 1], vec![0, 1]]);
        // Only one of them fits a second time.
        assert_eq!(assign(&models, &[80, 70]).unwrap(), [vec![0], vec![0, 1]]);
    }

    #[test]
    fn one_request_of_any_model_has_room_beside_all() {
        let models = [once(model(40, 5, 1)), once(model(30, 10, 1))];
        assert_eq!(assign(&models, &[80]).unwrap(), [vec![0], vec![0]]);
        let misfit = Misfit { model: 1, device: 0, needed_bytes: 40, free_bytes: 39 };
        assert_eq!(assign(&models, &[79]).unwrap_err(), misfit);
    }

    #[test]
    fn devices_that_share_a_model_have_no_other() {
        let shared = Wanted { devices: vec![0, 2], is_alone: true, ..model(10, 0, 3) };
        assert_eq!(assign(&[shared.clone(), model(1, 0, 3)], &[80, 80, 80]).unwrap(), [vec![0, 2], vec![1]]);
        let shared = Wanted { devices: vec![0, 1, 2], ..shared };
        assert_eq!(assign(&[shared, model(1, 0, 3)], &[80, 80, 80]).unwrap_err().model, 1);
    }

    #[test]
    fn what_was_said_holds_even_where_it_does_not_fit() {
        let on = |devices: &[usize], replicas, wanted: Wanted| Wanted { devices: devices.to_vec(), replicas, ..wanted };
        let models = [on(&[0], None, model(90, 0, 2)), model(20, 0, 2)];
        assert_eq!(assign(&models, &[80, 80]).unwrap(), [vec![0], vec![1]]);
        // Of the devices that may be, as many as were asked for.
        assert_eq!(assign(&[on(&[0, 2], Some(1), model(1, 0, 3))], &[9, 99, 10]).unwrap(), [vec![2]]);
        assert_eq!(assign(&[on(&[0, 2], Some(2), model(1, 0, 3))], &[9, 99, 10]).unwrap(), [vec![0, 2]]);
        let many = Wanted { replicas: Some(3), ..model(1, 0, 2) };
        assert_eq!(assign(&[many], &[9, 9]).unwrap_err().model, 0);
    }
}
