//! What every register must do, whatever it is made of. Each adapter's tests call [`run`].
