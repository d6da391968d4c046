//! Plain text tables.

/// Lays out `rows` under `header`: the first `left` columns to the left, the others to the right.
pub(crate) fn render(header: &[&str], rows: &[Vec<String>], left: usize) -> String {
    let columns = header.len();
    let mut widths: Vec<usize> = header.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (i, cell) in cells.enumerate().take(columns) {
            let fill = " ".repeat(widths[i].saturating_sub(cell.chars().count()));
            let gap = if i == 0 { "" } else { "  " };
            match i < left {
                true => text.extend([gap, cell, &fill]),
                false => text.extend([gap, &fill, cell]),
            }
        }
        out.push_str(text.trim_end());
        out.push('\n');
    };
    line(&mut header.iter().copied());
    let rules: Vec<String> = widths.iter().map(|w| "-".repeat(*w)).collect();
    line(&mut rules.iter().map(String::as_str));
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    out
}

/// A number with three significant digits; a dash for none.
pub(crate) fn number(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(v) if !v.is_finite() => "inf".into(),
        Some(0.0) => "0".into(),
        Some(v) => {
            let digits = (2 - v.abs().log10().floor() as i32).clamp(0, 6) as usize;
            format!("{v:.digits$}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".into(), "1.5".into()], vec!["long".into(), "10".into()]];
        assert_eq!(render(&["name", "x"], &rows, 1), "name    x\n----  ---\na     1.5\nlong   10\n");
    }

    #[test]
    fn numbers_have_three_digits() {
        let texts: Vec<String> = [1234.5, 12.345, 0.012_345, 0.0].iter().map(|v| number(Some(*v))).collect();
        assert_eq!(texts, ["1234", "12.3", "0.0123", "0"]);
        assert_eq!(number(None), "-");
    }
}
