//! The order of groups: dependencies first, then priority, then as in the file.

/// What the order depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Lower is earlier, among those whose dependencies are done.
    pub priority: i64,
    /// Indexes of the groups that have to be done before.
    pub depends_on: Vec<usize>,
}

/// Indexes in the order in which they are done, or a cycle: each depends on the one after it, the
/// last on the first.
pub fn order(nodes: &[Node]) -> Result<Vec<usize>, Vec<usize>> {
    let mut done = vec![false; nodes.len()];
    let mut order = Vec::with_capacity(nodes.len());
    while order.len() < nodes.len() {
        let ready = (0..nodes.len())
            .filter(|&at| !done[at] && nodes[at].depends_on.iter().all(|&on| done[on]));
        match ready.min_by_key(|&at| (nodes[at].priority, at)) {
            Some(next) => {
                done[next] = true;
                order.push(next);
            }
            None => return Err(cycle(nodes, &done)),
        }
    }
    Ok(order)
}

/// A cycle among the nodes that are not done, each of which waits for another one of them.
fn cycle(nodes: &[Node], done: &[bool]) -> Vec<usize> {
    let waits_for = |at: usize| {
        let mut on = nodes[at].depends_on.iter().copied();
        on.find(|&on| !done[on])
            .expect("a node that is not ready waits for one that is not done")
    };
    let mut at = done.iter().position(|done| !done).expect("some are left");
    let mut path = Vec::new();
    loop {
        if let Some(start) = path.iter().position(|&seen| seen == at) {
            return path.split_off(start);
        }
        path.push(at);
        at = waits_for(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node(priority: i64, depends_on: &[usize]) -> Node {
        Node {
            priority,
            depends_on: depends_on.to_vec(),
        }
    }

    #[test]
    fn dependencies_then_priority_then_the_file() {
        for (nodes, expected) in [
            (vec![], Ok(vec![])),
            (vec![node(1, &[]), node(1, &[])], Ok(vec![0, 1])),
            (vec![node(2, &[]), node(1, &[])], Ok(vec![1, 0])),
            (vec![node(1, &[1]), node(9, &[])], Ok(vec![1, 0])),
            (
                vec![node(5, &[]), node(1, &[3]), node(2, &[]), node(9, &[])],
                Ok(vec![2, 0, 3, 1]),
            ),
            (vec![node(1, &[0])], Err(vec![0])),
            (
                vec![node(1, &[1]), node(1, &[2]), node(1, &[1])],
                Err(vec![1, 2]),
            ),
        ] {
            assert_eq!(order(&nodes), expected, "{nodes:?}");
        }
    }

    proptest! {
        #[test]
        fn an_order_respects_all_edges_and_a_cycle_is_one(
            edges in proptest::collection::vec((0..8_usize, 0..8_usize), 0..14),
            priorities in proptest::collection::vec(0..4_i64, 8),
        ) {
            let nodes: Vec<Node> = (0..8).map(|at| Node {
                priority: priorities[at],
                depends_on: edges.iter().filter(|e| e.0 == at).map(|e| e.1).collect(),
            }).collect();
            match order(&nodes) {
                Ok(order) => {
                    let place = |node: usize| order.iter().position(|&n| n == node).unwrap();
                    prop_assert_eq!(order.len(), 8);
                    for &(from, on) in &edges {
                        prop_assert!(place(on) < place(from));
                    }
                    // The naive rule, step by step: nobody who was ready had a smaller priority.
                    for (at, &node) in order.iter().enumerate() {
                        for &later in &order[at..] {
                            let ready = nodes[later].depends_on.iter().all(|&on| place(on) < at);
                            prop_assert!(!ready || (nodes[node].priority, node) <= (nodes[later].priority, later));
                        }
                    }
                }
                Err(cycle) => {
                    for (at, &node) in cycle.iter().enumerate() {
                        let next = cycle[(at + 1) % cycle.len()];
                        prop_assert!(nodes[node].depends_on.contains(&next));
                    }
                }
            }
        }
    }
}
