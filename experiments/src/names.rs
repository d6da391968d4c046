//! Names of runs, panels, systems and sources: parts of files' names and of cells' ids.

/// What [`is_plain`] asks for, for messages.
pub(crate) const PLAIN: &str = "must be letters, digits, `-` and `_`";

/// Whether `name` can be part of a file's name anywhere and of a cell's id, whose parts `.` divides.
pub(crate) fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c))
}

/// Checks a name that was read; `what` is its place.
pub(crate) fn check(what: &str, name: &str) -> Result<(), String> {
    match is_plain(name) {
        true => Ok(()),
        false => Err(format!("{what} {name:?} {PLAIN}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_names_stay_in_their_folder_and_in_their_place_of_an_id() {
        assert!(["fig3", "online-1b", "hf_static", "paged-16"].into_iter().all(is_plain));
        assert!(!["", "..", "a.b", "../x", "a/b", "a\\b", "a b", "ü"].into_iter().any(is_plain));
        assert!(check("the name", "../x").unwrap_err().starts_with("the name \"../x\" must be"));
    }
}
